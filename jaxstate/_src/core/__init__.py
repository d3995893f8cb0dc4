"""What state is, where its value is found, and how it becomes inputs and outputs of a jaxpr."""
