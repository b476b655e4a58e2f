"""How a request becomes an answer: prompt, shots, retrieval, weights, output constraint."""
