"""From prompts to answers: padding, cached decoding, and likelihoods."""
