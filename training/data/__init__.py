"""From a data set to the batches of a training: opened, looked at, encoded, put in order."""
