"""Commands: parse arguments, call a service, print its result. They import heavy modules only when they run."""
