"""What can be trained, and the latents that training reads."""
