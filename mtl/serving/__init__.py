"""A server of predictions that learns: it needs the tables now and then, and Spark never."""
