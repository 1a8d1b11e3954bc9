"""One file per task: its loss and its predictions. Nothing else knows what a task is."""
