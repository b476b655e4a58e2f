"""What is taken in: connections and their time limits, bodies, the limits of fields, and the end at a signal."""
