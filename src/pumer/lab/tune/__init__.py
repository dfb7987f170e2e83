"""The best setting of a reducer for a model, a task and a bound: search, sequential tests,
evidence."""
