"""What past prompts left behind, so that a new one reads only what is new."""
