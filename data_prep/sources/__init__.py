"""Whatever a user names, as documents."""
