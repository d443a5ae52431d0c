"""How fast copydesk trains and reads, beside what a user would pick instead; `__main__` says how to run it."""
