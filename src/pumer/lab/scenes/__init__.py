"""The generated world: drawing, questions, statements and captions, their files, and the tasks on
them."""
