"""What requests and answers look like, one file per endpoint."""
