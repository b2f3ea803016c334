"""Training the parts of the mini release that only the toy world needs."""
