"""radllama: fine-tune Llama 3 on radiology reports and judge what it writes."""
