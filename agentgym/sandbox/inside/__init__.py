"""What is sent into a box and runs there, hostile code beside it. Law: standard library only, any Python from 3.9 on;
nothing here is trusted by the host."""
