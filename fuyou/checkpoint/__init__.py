"""Files that outlive a run: exports in the Hugging Face layout."""
