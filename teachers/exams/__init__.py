"""What an evaluation asks, how often, and how its answers are counted; and exams that others hold."""
