"""The protocol's edge: one file a feature. Nothing else imports this package."""
