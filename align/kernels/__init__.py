"""What the methods are made of: cells, rows by cell, chains of tokens, maps. Nothing here knows a batch or a model."""
