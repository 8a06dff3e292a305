"""The programs that run a model, each in a file with its parts beside it; `teachers.BACKENDS` names them."""
