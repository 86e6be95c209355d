"""The parameter server: workers push gradients to servers, who own the parameters, and pull values from them."""
