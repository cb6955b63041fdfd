"""The label-efficiency experiment: many runs, their results and what these show."""
