"""Text to tokens and back: tokenizers, prompts, corpora and completions."""
