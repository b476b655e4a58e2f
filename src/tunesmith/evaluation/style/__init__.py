"""Style as a number: a classifier tells reference answers from the base model's, then sees the candidates' answers."""
