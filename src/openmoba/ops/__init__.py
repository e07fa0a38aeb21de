"""The MoBA operation and its implementations; `api` is the entrance, `reference` decides what is right."""
