"""What a measurement leaves behind: files that survive a kill, where a number comes from, and who works on a folder."""
