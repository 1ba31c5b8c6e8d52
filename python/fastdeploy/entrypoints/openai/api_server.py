"""`python -m fastdeploy.entrypoints.openai.api_server --model ...` serves the model with ernest."""
import sys

from fastdeploy.launcher import serve

if __name__ == "__main__":
    serve(sys.argv[1:])
