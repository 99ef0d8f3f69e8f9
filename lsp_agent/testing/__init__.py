"""Running tests: runners, structured results, integrity of tests, sandbox."""
