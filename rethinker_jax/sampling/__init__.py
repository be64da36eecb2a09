"""The sampling loop: prefill each prompt once, decode in slots, choose tokens."""
