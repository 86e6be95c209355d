"""Routes: the ways by which an operation's numbers can travel."""
