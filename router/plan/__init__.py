"""`prfaas plan` and `prfaas profile`: is a second site worth it, how to run it, and what a worker costs."""
