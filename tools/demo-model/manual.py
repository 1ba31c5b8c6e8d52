"""What the demo models know about ernest: tables of facts in English and Chinese, and the ways to ask for them.

Every row is a fact of the manual in our own words. corpus.py asks for the questions and answers made here; nothing in
this file is random. A question is (key, question, answer): the key names the fact and the way of asking.
"""

# flag, default (text), what it sets (English, Chinese), a sentence (English, Chinese)
FLAGS = [
    ("--port", "8000", "the HTTP port", "HTTP 端口", "sets the HTTP port of the server", "设置服务器的 HTTP 端口"),
    ("--host", "127.0.0.1", "the address to bind", "监听地址", "sets the address that the server listens on", "设置服务器监听的地址"),
    ("--model", "none", "the model folder", "模型目录", "names the folder of the model to serve", "指定要加载的模型目录"),
    ("--max-model-len", "2048", "the longest context", "最大上下文长度", "limits prompt and output tokens of a request together",
     "限制一个请求的输入和输出 token 总数"),
    ("--max-num-seqs", "8", "how many sequences run at once", "并发序列数", "limits how many sequences run at once, from 1 to 256",
     "限制同时运行的序列数，范围是 1 到 256"),
    ("--max-num-batched-tokens", "chosen at start", "the token budget of a step", "每步的 token 预算", "sets the most tokens that one step computes",
     "设置一步最多计算的 token 数"),
    ("--block-size", "64", "the size of a KV block", "KV 块大小", "sets how many tokens one KV cache block holds", "设置一个 KV 缓存块保存的 token 数"),
    ("--quantization", "none", "the weight format", "权重量化格式", "picks the weight format: wint8, wint4 or block_wise_fp8",
     "选择权重格式：wint8、wint4 或 block_wise_fp8"),
    ("--gpu-memory-utilization", "0.9", "the share of memory to use", "显存使用比例", "sets the share of the memory that the server may use",
     "设置服务器可以使用的内存比例"),
    ("--kv-cache-ratio", "0.75", "the share of KV blocks for prompts", "输入部分的 KV 块比例", "sets the share of KV blocks for prompts under the old scheduler",
     "在旧调度器下设置留给输入的 KV 块比例"),
    ("--swap-space", "none", "host memory for evicted blocks", "换出块的主机内存", "gives GiB of host memory to KV blocks that were evicted",
     "为被换出的 KV 块提供若干 GiB 主机内存"),
    ("--tensor-parallel-size", "1", "the number of devices", "张量并行数", "sets over how many devices the model is split", "设置模型切分到多少个设备"),
    ("--seed", "0", "the random seed", "随机种子", "sets the seed for requests that bring none", "为没有种子的请求设置随机种子"),
    ("--api-key", "none", "the API key", "API 密钥", "makes the server ask for a bearer key", "让服务器要求提供密钥"),
    ("--served-model-name", "none", "the public model name", "对外的模型名", "sets the model name that clients must use", "设置客户端必须使用的模型名"),
    ("--max-concurrency", "512", "the most requests at once", "最大并发请求数", "limits the requests in flight; more get a 429", "限制同时处理的请求数，超出的返回 429"),
    ("--max-logprobs", "20", "the most top_logprobs", "top_logprobs 上限", "limits how many top_logprobs a request may ask for", "限制请求的 top_logprobs 个数"),
    ("--enable-prefix-caching", "on", "prefix caching", "前缀缓存", "lets prompts reuse the KV blocks of a shared prefix", "让相同前缀的请求复用 KV 块"),
    ("--enable-chunked-prefill", "on", "chunked prefill", "分块预填充", "computes long prompts in pieces so that other streams go on", "把长输入分块计算，不阻塞其他请求"),
    ("--speculative-config", "none", "speculative decoding", "投机解码", "turns on draft tokens, for example from the MTP layer", "开启草稿 token，例如来自 MTP 层"),
    ("--timeout-graceful-shutdown", "30", "the drain time", "优雅退出时间", "sets how many seconds a drain may take after SIGTERM", "设置收到 SIGTERM 后最多等待的秒数"),
    ("--metrics-port", "the API port", "the port of the metrics", "指标端口", "moves the metrics to a port of their own", "把指标放到单独的端口"),
    ("--config", "none", "the YAML file", "YAML 配置文件", "reads flags from a YAML file; flags on the command line win", "从 YAML 文件读取参数，命令行优先"),
    ("--dry-run", "off", "the memory plan", "内存计划", "prints the memory plan and exits", "打印内存计划然后退出"),
]

# method and path, English, Chinese, what for (English, Chinese)
ENDPOINTS = [
    ("/v1/chat/completions", "answers a conversation", "回答一段对话", "chat", "聊天"),
    ("/v1/completions", "continues a plain text", "续写一段文本", "plain text completion", "文本续写"),
    ("/v1/models", "lists the model that is served", "列出正在服务的模型", "listing the models", "列出模型"),
    ("/health", "says 200 when the server is well and 503 while it loads", "正常时返回 200，加载时返回 503", "a health check", "健康检查"),
    ("/metrics", "shows the Prometheus metrics", "显示 Prometheus 指标", "metrics", "查看指标"),
    ("/tokenize", "turns text into token ids", "把文本变成 token 编号", "tokenizing text", "分词"),
    ("/detokenize", "turns token ids into text", "把 token 编号变成文本", "turning ids into text", "把编号变回文本"),
    ("/version", "tells the version of ernest", "返回 ernest 的版本", "the version", "查看版本"),
]

QUANTS = [
    ("wint8", "wint8 keeps each weight as an 8-bit integer with one scale per output channel", "wint8 把每个权重存成 8 位整数，每个输出通道一个缩放系数"),
    ("wint4", "wint4 keeps routed experts in 4 bits and dense layers in 8 bits", "wint4 把路由专家存成 4 位，其余稠密层存成 8 位"),
    ("block_wise_fp8", "block_wise_fp8 keeps weights as 8-bit floats in blocks of 128 by 128", "block_wise_fp8 把权重存成 8 位浮点数，按 128 乘 128 分块"),
    ("bf16", "bf16 is a 16-bit float with 8 bits of exponent; it is the format of the published weights", "bf16 是 16 位浮点数，有 8 位指数，也是发布权重的格式"),
    ("mix_quant", "mix_quant picks one format for dense layers and another for experts", "mix_quant 为稠密层和专家分别选择格式"),
]

STATUS = [
    ("400", "the request is wrong: the message names the field and the value", "请求有错误，消息会指出字段和值"),
    ("401", "the API key is missing or wrong", "缺少 API 密钥或密钥错误"),
    ("404", "there is no such path or model", "没有这个路径或模型"),
    ("405", "the path is right but the method is not", "路径正确但方法不对"),
    ("413", "the request body is too large", "请求体太大"),
    ("429", "too many requests are in flight; wait and try again", "请求太多，请稍后重试"),
    ("500", "the server failed while it was running", "服务器运行时出错"),
    ("503", "the server is still loading or is shutting down", "服务器正在加载或正在关闭"),
]

COMMANDS = [
    ("ernest serve", "starts the server", "启动服务器"),
    ("ernest chat", "opens a chat in the terminal", "在终端里打开聊天"),
    ("ernest complete", "continues a text in the terminal", "在终端里续写文本"),
    ("ernest tokenize", "shows the tokens of a text", "显示文本的 token"),
    ("ernest make-model", "writes a checkpoint of random weights", "生成随机权重的模型"),
    ("ernest quantize", "writes a quantized checkpoint", "生成量化后的模型"),
    ("ernest bench", "measures the speed of a server", "测量服务器的速度"),
    ("ernest collect-env", "reports the machine and the versions", "报告机器和版本信息"),
    ("make demo", "builds ernest and starts a chat with a demo model", "编译 ernest 并启动演示模型"),
    ("make test", "builds ernest and runs its tests", "编译 ernest 并运行测试"),
]

VARIABLES = [
    ("FD_API_KEY", "holds the accepted API keys, separated by commas", "保存可接受的 API 密钥，用逗号分隔"),
    ("FD_LOG_DIR", "names the folder of the log files", "指定日志目录"),
    ("FD_SAMPLING_CLASS", "picks the sampling method, for example rejection", "选择采样方法，例如 rejection"),
    ("ENABLE_V1_KVCACHE_SCHEDULER", "picks the scheduler: 1 hands out KV blocks on demand", "选择调度器：1 表示按需分配 KV 块"),
    ("FD_DISABLE_CHUNKED_PREFILL", "turns chunked prefill off when it is 1", "等于 1 时关闭分块预填充"),
    ("CUDA_VISIBLE_DEVICES", "picks the GPUs that are used", "选择使用哪些 GPU"),
]

# Free facts: name, English questions, English answer, Chinese questions, Chinese answer
FACTS = [
    ("ernest", ["What is ernest?", "Tell me about ernest.", "What does ernest do?", "Explain ernest.", "What is this server?", "What is ernest for?",
                "Can you explain what ernest is?", "Describe ernest."],
     "ernest is a small, fast server for Baidu's ERNIE-4.5 language models, written in C.",
     ["ernest 是什么？", "介绍一下 ernest。", "ernest 有什么用？", "什么是 ernest？", "请介绍 ernest。"], "ernest 是一个小而快的服务器，用 C 语言写成，用来运行百度的 ERNIE-4.5 语言模型。"),
    ("models", ["Which models does ernest serve?", "What models can ernest run?", "Which models are supported?", "What models do you support?",
                "List the supported models."],
     "ernest serves ERNIE-4.5-0.3B and ERNIE-4.5-21B-A3B.", ["ernest 支持哪些模型？", "可以运行什么模型？", "支持哪些模型？"], "ernest 支持 ERNIE-4.5-0.3B 和 ERNIE-4.5-21B-A3B。"),
    ("language", ["In which language is ernest written?", "What language is ernest written in?", "Is ernest written in Python?", "What programming language does ernest use?"],
     "ernest is written in C.", ["ernest 用什么语言写的？", "ernest 是用 Python 写的吗？"], "ernest 是用 C 语言写的。"),
    ("start", ["How do I start the server?", "How do I start ernest?", "How can I run the server?", "How to launch ernest?", "How do I run ernest?", "how do i serve a model",
               "What is the command to start the server?"],
     "Run: ernest serve --model DIR", ["怎么启动服务器？", "如何启动 ernest？", "怎么运行 ernest？"], "运行：ernest serve --model 目录"),
    ("stop", ["How do I stop the server?", "How can I stop ernest?", "How do I shut down the server?", "How to quit the server?"],
     "Send SIGTERM or press Ctrl-C: running requests finish first. A second signal stops at once.", ["怎么停止服务器？", "如何关闭 ernest？"],
     "发送 SIGTERM 或按 Ctrl-C，正在运行的请求会先完成；第二次信号会立即停止。"),
    ("speedup", ["How do I make it faster?", "How can I speed up ernest?", "The server is slow. What can I do?", "How do I get more speed?"],
     "Try --quantization wint8, and keep prefix caching on.", ["怎么让它更快？", "服务器很慢怎么办？"], "可以试试 --quantization wint8，并保持前缀缓存开启。"),
    ("memory", ["How do I use less memory?", "ernest uses too much memory.", "I run out of memory. What can I do?", "How can I save memory?", "It says out of memory. Help!"],
     "Lower --max-model-len or --max-num-seqs, or use --quantization wint4.", ["怎么减少内存？", "内存不够怎么办？"], "可以降低 --max-model-len 或 --max-num-seqs，或者使用 --quantization wint4。"),
    ("stream", ["How do I stream the answer?", "How do I get tokens one by one?", "How do I turn on streaming?", "Can ernest stream?"],
     "Set \"stream\": true in the request; the answer comes as server-sent events.", ["怎么使用流式输出？", "如何开启流式输出？"], "在请求里设置 \"stream\": true，回答会以 SSE 事件返回。"),
    ("temp", ["What is temperature?", "What does temperature do?", "Explain temperature.", "What is the temperature parameter?"],
     "Temperature makes the answer more random; 0 always takes the most likely token.", ["temperature 是什么？", "温度参数有什么用？"], "温度越高回答越随机；0 表示总是选最可能的 token。"),
    ("topp", ["What is top_p?", "What does top_p do?", "Explain top_p."], "top_p keeps the smallest set of tokens whose probabilities add up to p.",
     ["top_p 是什么？", "top_p 有什么用？"], "top_p 只保留概率之和达到 p 的最小 token 集合。"),
    ("topk", ["What is top_k?", "What does top_k do?", "Explain top_k."], "top_k keeps only the k most likely tokens.", ["top_k 是什么？", "top_k 有什么用？"],
     "top_k 只保留最可能的 k 个 token。"),
    ("kv", ["What is the KV cache?", "What does the KV cache do?", "Explain the KV cache.", "what is a kv cache"],
     "The KV cache keeps the keys and values of past tokens so that they are computed only once.", ["KV 缓存是什么？", "什么是 KV 缓存？"], "KV 缓存保存过去 token 的键和值，这样只需要计算一次。"),
    ("kvblock", ["How many tokens are in a KV block?", "How big is a KV block?", "What is the KV block size?", "How large is a page of the KV cache?"],
     "A KV block holds 64 tokens.", ["一个 KV 块有多少 token？", "KV 块有多大？"], "一个 KV 块保存 64 个 token。"),
    ("prefix", ["What is prefix caching?", "How does prefix caching work?", "Explain prefix caching."],
     "Prefix caching reuses the KV blocks of a prompt that was seen before.", ["前缀缓存是什么？", "什么是前缀缓存？"], "前缀缓存会复用以前见过的输入的 KV 块。"),
    ("chunk", ["What is chunked prefill?", "How does chunked prefill work?", "Explain chunked prefill."],
     "Chunked prefill computes a long prompt in pieces, so other streams do not wait.", ["分块预填充是什么？", "什么是分块预填充？"], "分块预填充把长输入分成小块计算，其他请求不用等待。"),
    ("mtp", ["What is MTP?", "What does the MTP layer do?", "Explain MTP.", "What is multi-token prediction?"],
     "MTP is a small extra layer that guesses one more token; the model checks the guess.", ["MTP 是什么？", "什么是 MTP？"], "MTP 是一个小的附加层，它多猜一个 token，再由模型检查。"),
    ("moe", ["What is a mixture of experts?", "What is MoE?", "Explain MoE.", "What are experts?"],
     "In a mixture of experts a router picks a few small networks for each token.", ["MoE 是什么？", "什么是混合专家？"], "在混合专家模型里，路由器为每个 token 选择几个小网络。"),
    ("token", ["What is a token?", "What are tokens?", "Explain tokens."], "A token is a piece of text, often a word or a part of one.", ["token 是什么？", "什么是 token？"],
     "token 是一小段文本，通常是一个词或词的一部分。"),
    ("experts", ["How many experts does the 21B model have?", "How many experts does ERNIE-4.5-21B-A3B have?", "How many experts are there?"],
     "ERNIE-4.5-21B-A3B has 64 routed experts and uses 6 of them for each token.", ["21B 模型有多少专家？", "ERNIE-4.5-21B-A3B 有多少专家？"], "ERNIE-4.5-21B-A3B 有 64 个路由专家，每个 token 使用其中 6 个。"),
    ("layers03", ["How many layers does the 0.3B model have?", "How many layers does ERNIE-4.5-0.3B have?"], "ERNIE-4.5-0.3B has 18 layers.",
     ["0.3B 模型有多少层？", "ERNIE-4.5-0.3B 有多少层？"], "ERNIE-4.5-0.3B 有 18 层。"),
    ("layers21", ["How many layers does the 21B model have?", "How many layers does ERNIE-4.5-21B-A3B have?"], "ERNIE-4.5-21B-A3B has 28 layers.",
     ["21B 模型有多少层？", "ERNIE-4.5-21B-A3B 有多少层？"], "ERNIE-4.5-21B-A3B 有 28 层。"),
    ("gpu", ["Do I need a GPU?", "Does ernest need a GPU?", "Can I run it without a GPU?", "Does it run on a CPU?", "Can ernest run on the CPU?"],
     "No GPU is needed: ernest also runs on the CPU.", ["需要 GPU 吗？", "没有 GPU 可以运行吗？"], "不需要 GPU，ernest 也可以在 CPU 上运行。"),
    ("openai", ["Is ernest compatible with OpenAI?", "Can I use the OpenAI client?", "Does the OpenAI SDK work?", "Which API does ernest speak?"],
     "Yes: ernest speaks the OpenAI protocol, so set base_url to http://127.0.0.1:8000/v1", ["可以用 OpenAI 客户端吗？", "ernest 兼容 OpenAI 吗？"],
     "可以，ernest 使用 OpenAI 协议，把 base_url 设为 http://127.0.0.1:8000/v1"),
    ("portbusy", ["The port is already in use.", "Port 8000 is in use. What can I do?", "It says address in use.", "How do I change the port?", "How do I use another port?"],
     "Pick another port, for example: --port 8001", ["端口被占用怎么办？", "怎么换端口？"], "换一个端口，例如：--port 8001"),
    ("toolong", ["My prompt is too long.", "What is context_length_exceeded?", "It says context_length_exceeded.", "The prompt does not fit. What can I do?"],
     "The prompt and the answer must fit into --max-model-len: shorten the prompt or raise the limit.", ["输入太长怎么办？", "context_length_exceeded 是什么意思？"],
     "输入和回答必须在 --max-model-len 之内：缩短输入或提高上限。"),
    ("deterministic", ["Is the answer always the same?", "Does the same request give the same answer?", "Is ernest deterministic?"],
     "Yes: the same request with the same seed gives the same answer, whatever else runs.", ["同样的请求会得到同样的回答吗？", "结果是确定的吗？"], "是的，同样的请求和种子会得到同样的回答。"),
    ("fastdeploy", ["What is FastDeploy?", "Is ernest like FastDeploy?", "Can I use my FastDeploy command line?", "Do FastDeploy flags work?"],
     "FastDeploy is Baidu's server in Python; ernest understands its flags and endpoints.", ["FastDeploy 是什么？", "FastDeploy 的参数可以用吗？"], "FastDeploy 是百度的 Python 服务器，ernest 支持它的参数和接口。"),
    ("real", ["How do I serve a real model?", "How do I use the real ERNIE?", "How do I run ERNIE-4.5-0.3B?", "Can I get a better model?"],
     "Download ERNIE-4.5-0.3B and run: ernest serve --model DIR", ["怎么运行真正的模型？", "怎么使用真正的 ERNIE？"], "下载 ERNIE-4.5-0.3B，然后运行：ernest serve --model 目录"),
    ("ernie", ["What is ERNIE?", "What is ERNIE-4.5?", "Who made ERNIE?", "Tell me about ERNIE."], "ERNIE-4.5 is a family of language models by Baidu.",
     ["ERNIE 是什么？", "ERNIE 是谁做的？", "什么是 ERNIE-4.5？"], "ERNIE-4.5 是百度的语言模型系列。"),
    ("stopstr", ["What are stop strings?", "What does stop do?", "How do I stop at a word?"], "The answer ends before the first stop string that appears in it.",
     ["stop 参数有什么用？", "停止字符串是什么？"], "回答会在第一个停止字符串之前结束。"),
    ("maxtok", ["How do I limit the length of the answer?", "What is max_tokens?", "What does max_tokens do?", "How do I get shorter answers?"],
     "Set max_tokens: it is the most tokens that the answer may have.", ["max_tokens 是什么？", "怎么限制回答的长度？"], "设置 max_tokens，它是回答最多的 token 数。"),
    ("health", ["How do I know that the server is ready?", "How do I check if the server is up?", "Is the server ready?"],
     "Ask GET /health: 200 means ready, 503 means loading.", ["怎么知道服务器准备好了？", "怎么检查服务器状态？"], "访问 /health：200 表示就绪，503 表示正在加载。"),
]


def _flag_questions():
    for flag, default, what, zh_what, does, zh_does in FLAGS:
        bare = flag[2:]
        answer = f"{flag} {does}. The default is {default}."
        for q in ("What does {f} do?", "What is {f}?", "Explain {f}.", "What is the flag {f} for?", "Tell me about {f}.", "What does the {f} flag mean?",
                  "what's {f}", "How does {f} work?", "{f}?", "What is {f} good for?"):
            yield f"flag/{bare}/does/{q}", q.format(f=flag), answer, "en"
        for q in ("What does {f} do?", "What is {f}?", "Explain the option {f}."):
            yield f"flag/{bare}/bare/{q}", q.format(f=bare), answer, "en"
        for q in ("What is the default of {f}?", "What is the default value of {f}?", "default of {f}?", "Which default does {f} have?", "What is {f} by default?"):
            yield f"flag/{bare}/default/{q}", q.format(f=flag), f"The default of {flag} is {default}.", "en"
        for q in ("Which flag sets {w}?", "Which option is for {w}?", "What flag do I use for {w}?", "What is the flag for {w}?", "Which flag controls {w}?"):
            yield f"flag/{bare}/which/{q}", q.format(w=what), f"Use {flag}: it {does}.", "en"
        if default[0].isdigit():
            for q in ("What is the default for {w}?", "By default, what is {w}?", "What is {w} by default?"):
                yield f"flag/{bare}/what/{q}", q.format(w=what), f"The default is {default}; change it with {flag}.", "en"
        zh_default = {"none": "空", "on": "开启", "off": "关闭", "chosen at start": "启动时决定", "the API port": "API 端口"}.get(default, default)
        zh_answer = f"{flag} {zh_does}。默认值是 {zh_default}。"
        for q in ("{f} 是什么？", "{f} 有什么用？", "解释一下 {f}。", "参数 {f} 是什么意思？", "{f} 是做什么的？"):
            yield f"flag/{bare}/zh/{q}", q.format(f=flag), zh_answer, "zh"
        for q in ("{f} 的默认值是多少？", "{f} 默认是什么？"):
            yield f"flag/{bare}/zhdefault/{q}", q.format(f=flag), f"{flag} 的默认值是 {zh_default}。", "zh"
        for q in ("哪个参数设置{w}？", "怎么设置{w}？"):
            yield f"flag/{bare}/zhwhich/{q}", q.format(w=zh_what), f"使用 {flag}，它{zh_does}。", "zh"
    for q in ("What is the default port?", "Which port does ernest use?", "Which port does the server listen on?", "What port is it on?", "Which port is used by default?",
              "what is the port", "On which port does ernest listen?"):
        yield f"port/{q}", q, "The default port is 8000; change it with --port.", "en"
    for q in ("默认端口是多少？", "ernest 使用哪个端口？", "服务器的端口是多少？", "端口是多少？"):
        yield f"port/{q}", q, "默认端口是 8000，可以用 --port 修改。", "zh"


def _endpoint_questions():
    for path, does, zh_does, what, zh_what in ENDPOINTS:
        for q in ("What does {p} do?", "What is {p}?", "What is the endpoint {p} for?", "Explain {p}.", "What happens at {p}?", "What can I do with {p}?"):
            yield f"path{path}/{q}", q.format(p=path), f"{path} {does}.", "en"
        for q in ("Which endpoint is for {w}?", "Which path do I use for {w}?", "What is the endpoint for {w}?", "What is the URL for {w}?", "Where do I send a request for {w}?"):
            yield f"path{path}/which/{q}", q.format(w=what), f"Use {path}: it {does}.", "en"
        for q in ("{p} 是什么？", "{p} 有什么用？", "接口 {p} 是做什么的？"):
            yield f"path{path}/zh/{q}", q.format(p=path), f"{path} {zh_does}。", "zh"
        for q in ("哪个接口用来{w}？", "{w}用哪个接口？"):
            yield f"path{path}/zhwhich/{q}", q.format(w=zh_what), f"使用 {path}，它{zh_does}。", "zh"


def _named_questions():
    for name, en, zh in QUANTS:
        for q in ("What is {n}?", "What does {n} mean?", "Explain {n}.", "Tell me about {n}.", "How does {n} work?", "What is the quantization {n}?"):
            yield f"quant/{name}/{q}", q.format(n=name), en + ".", "en"
        for q in ("{n} 是什么？", "{n} 是什么意思？", "解释一下 {n}。"):
            yield f"quant/{name}/{q}", q.format(n=name), zh + "。", "zh"
    for q in ("Which quantizations are there?", "What quantization formats does ernest support?", "Which quantization can I use?", "List the quantization names.",
              "What can I pass to --quantization?"):
        yield f"quants/{q}", q, "You can use wint8, wint4, block_wise_fp8 or mix_quant.", "en"
    for q in ("支持哪些量化格式？", "有哪些量化方式？"):
        yield f"quants/{q}", q, "可以使用 wint8、wint4、block_wise_fp8 或 mix_quant。", "zh"
    for code, en, zh in STATUS:
        for q in ("What does {n} mean?", "What is error {n}?", "I get a {n}.", "Why do I get status {n}?", "What does HTTP {n} mean?", "The server says {n}. Why?",
                  "What is a {n} error?", "Explain the status {n}."):
            yield f"status/{code}/{q}", q.format(n=code), f"{code} means that {en}.", "en"
        for q in ("{n} 是什么意思？", "为什么返回 {n}？", "错误 {n} 是什么？"):
            yield f"status/{code}/{q}", q.format(n=code), f"{code} 表示{zh}。", "zh"
    for name, en, zh in COMMANDS:
        for q in ("What does {n} do?", "What is {n}?", "Explain {n}.", "What is the command {n} for?", "What happens when I run {n}?"):
            yield f"command/{name}/{q}", q.format(n=name), f"{name} {en}.", "en"
        for q in ("{n} 是什么？", "{n} 有什么用？"):
            yield f"command/{name}/{q}", q.format(n=name), f"{name} {zh}。", "zh"
    for name, en, zh in VARIABLES:
        for q in ("What does {n} do?", "What is {n}?", "Explain {n}.", "What is the variable {n} for?"):
            yield f"variable/{name}/{q}", q.format(n=name), f"{name} {en}.", "en"
        for q in ("{n} 是什么？", "{n} 有什么用？"):
            yield f"variable/{name}/{q}", q.format(n=name), f"{name} {zh}。", "zh"


def questions():
    """All (key, question, answer, language) of the manual, in a fixed order."""
    out = list(_flag_questions()) + list(_endpoint_questions()) + list(_named_questions())
    for name, en_q, en_a, zh_q, zh_a in FACTS:
        out += [(f"fact/{name}/{q}", q, en_a, "en") for q in en_q]
        out += [(f"fact/{name}/{q}", q, zh_a, "zh") for q in zh_q]
    return out


def pairs():
    """(English question, Chinese question, English answer, Chinese answer) that ask for the same thing."""
    return [(e, z, en_a, zh_a) for _, en_q, en_a, zh_q, zh_a in FACTS for e, z in zip(en_q, zh_q)]
