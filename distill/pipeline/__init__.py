"""`distill run`: a file of stages, each a command of ours, as a graph whose finished parts are never done again.

A stage's folder is named after a hash of all that can change its result. So a changed option is another folder, and
changing it back finds the old one. What is in the folder is the command's own business, and so is resuming it: nothing
here knows how to generate, train or evaluate. It runs on one machine and is no scheduler of a cluster.
"""
