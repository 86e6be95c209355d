"""Precision: ``modes`` is what the model is computed in, ``loss_scale`` keeps 16-bit gradients in range, ``masters`` is
what the optimizer updates."""
