"""Does a release make what prompts ask for?"""
