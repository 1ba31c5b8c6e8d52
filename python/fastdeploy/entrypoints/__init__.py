"""See the package fastdeploy."""
