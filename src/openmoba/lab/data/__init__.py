"""From a source of documents to windows of tokens."""
