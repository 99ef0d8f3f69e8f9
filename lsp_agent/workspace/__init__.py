"""The user's tree: documents and overlay, scratch copies, checkpoints and undo, the watcher."""
