"""From a batch to a loss: which rows and spans meet, what either model says there, and the modes of training."""
