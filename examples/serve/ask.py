"""Asks a server that speaks OpenAI's protocol (`transformers serve`, vLLM), and prints the answer as it comes.

python examples/serve/ask.py MODEL PROMPT [URL]
"""

import sys

from openai import OpenAI


def main(model: str, prompt: str, url: str = "http://localhost:8000/v1") -> None:
    client = OpenAI(base_url=url, api_key="none")  # a server of your own asks for no key
    messages = [{"role": "user", "content": prompt}]
    for part in client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True):
        if part.choices and part.choices[0].delta.content:
            print(part.choices[0].delta.content, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
