"""What a study's numbers say, in sentences, by what they are about; `stage` puts them together."""
