"""How to run the pair: on one machine, in containers, with an identity provider."""
