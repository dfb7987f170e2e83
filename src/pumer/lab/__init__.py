"""What trains or measures: data, tasks, training, benches, studies and the commands. The core never
imports it."""
