"""From a request to its answer: plans, and what makes and runs them."""
