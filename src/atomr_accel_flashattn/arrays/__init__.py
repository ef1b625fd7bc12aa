"""Arrays of any library: read without copying, made, and the streams they live on."""
