"""What the server remembers: jobs in a database, images in files. Nothing that was accepted is ever lost."""
