"""Word lists that the tasks of corpus.py draw from."""

# English word, Chinese word: things, used for sorting, copying, spelling, stories and translation
PAIRS = """apple 苹果|banana 香蕉|bird 鸟|boat 船|book 书|bread 面包|bridge 桥|cake 蛋糕|car 汽车|cat 猫|chair 椅子|cheese 奶酪|city 城市|cloud 云|coat 外套|coffee 咖啡|
cow 牛|cup 杯子|dog 狗|door 门|duck 鸭子|ear 耳朵|egg 鸡蛋|eye 眼睛|farm 农场|fire 火|fish 鱼|flower 花|fork 叉子|fox 狐狸|frog 青蛙|garden 花园|glass 玻璃|grape 葡萄|grass 草|
hand 手|hat 帽子|heart 心|hill 小山|horse 马|house 房子|ice 冰|island 岛|juice 果汁|key 钥匙|kitchen 厨房|lake 湖|lamp 灯|leaf 叶子|lemon 柠檬|lion 狮子|map 地图|milk 牛奶|
moon 月亮|mountain 山|mouse 老鼠|music 音乐|nose 鼻子|ocean 海洋|onion 洋葱|orange 橙子|owl 猫头鹰|paper 纸|peach 桃子|pear 梨|pen 笔|piano 钢琴|pig 猪|rabbit 兔子|rain 雨|
rice 米饭|ring 戒指|river 河|road 路|rose 玫瑰|salt 盐|school 学校|sea 海|sheep 羊|ship 轮船|shoe 鞋|snow 雪|song 歌|soup 汤|star 星星|stone 石头|sugar 糖|sun 太阳|table 桌子|
tea 茶|tiger 老虎|train 火车|tree 树|water 水|wind 风|window 窗户|wolf 狼|wood 木头|zebra 斑马"""
THINGS = [tuple(p.strip().split(" ")) for p in PAIRS.replace("\n", "").split("|")]
WORDS = [e for e, _ in THINGS]
MORE_WORDS = """ant bag ball bear bee bell bike box bus candle castle circle corn cotton crab crown desk drum engine fan feather field flag forest gate goat gold
hammer iron jam kite ladder lemonade machine market nest net oven paint park pencil pepper plate pond potato queen robot rocket rope sand seed shell silver
spoon storm street tent tower toy turtle umbrella valley village wagon wall wheel wing yard zoo""".split()

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Maria", "Nina", "Oscar", "Paul", "Rosa", "Sam",
         "Tom", "Uma", "Vera", "Will", "Yara", "Zoe", "Alice", "Bob", "Carol", "Eve", "John", "Lucy", "Max", "Mia", "Peter", "Sarah", "Alex", "Lily", "Mark", "Julia",
         "Daniel", "Laura"]
ZH_NAMES = ["小明", "小红", "小华", "李雷", "王芳", "张伟", "刘洋", "陈静", "小丽", "小刚", "赵敏", "周杰"]
COLORS = [("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("yellow", "黄色"), ("black", "黑色"), ("white", "白色"), ("pink", "粉色"), ("purple", "紫色"),
          ("brown", "棕色"), ("gray", "灰色")]
CITIES = [("Paris", "巴黎"), ("London", "伦敦"), ("Berlin", "柏林"), ("Rome", "罗马"), ("Tokyo", "东京"), ("Beijing", "北京"), ("Shanghai", "上海"), ("Madrid", "马德里"),
          ("Vienna", "维也纳"), ("Oslo", "奥斯陆"), ("Cairo", "开罗"), ("Sydney", "悉尼"), ("Moscow", "莫斯科"), ("Boston", "波士顿"), ("Lisbon", "里斯本"), ("Delhi", "德里")]
CAPITALS = [("France", "Paris", "法国", "巴黎"), ("Germany", "Berlin", "德国", "柏林"), ("Italy", "Rome", "意大利", "罗马"), ("Spain", "Madrid", "西班牙", "马德里"),
            ("Japan", "Tokyo", "日本", "东京"), ("China", "Beijing", "中国", "北京"), ("Austria", "Vienna", "奥地利", "维也纳"), ("Norway", "Oslo", "挪威", "奥斯陆"),
            ("Egypt", "Cairo", "埃及", "开罗"), ("Portugal", "Lisbon", "葡萄牙", "里斯本"), ("Russia", "Moscow", "俄罗斯", "莫斯科"), ("England", "London", "英国", "伦敦")]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ZH_DAYS = ["星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
OPPOSITES = [("hot", "cold"), ("big", "small"), ("fast", "slow"), ("up", "down"), ("left", "right"), ("day", "night"), ("open", "closed"), ("old", "young"),
             ("long", "short"), ("high", "low"), ("happy", "sad"), ("light", "dark"), ("wet", "dry"), ("early", "late"), ("full", "empty"), ("hard", "soft"),
             ("rich", "poor"), ("strong", "weak"), ("clean", "dirty"), ("first", "last")]
ZH_DIGITS = "零一二三四五六七八九十"
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]

# unit from, unit to, factor, Chinese from, Chinese to, largest count
UNITS = [("kilometers", "meters", 1000, "公里", "米", 99), ("meters", "centimeters", 100, "米", "厘米", 99), ("centimeters", "millimeters", 10, "厘米", "毫米", 99),
         ("kilograms", "grams", 1000, "公斤", "克", 99), ("liters", "milliliters", 1000, "升", "毫升", 99), ("hours", "minutes", 60, "小时", "分钟", 48),
         ("minutes", "seconds", 60, "分钟", "秒", 60), ("days", "hours", 24, "天", "小时", 31), ("weeks", "days", 7, "周", "天", 52), ("years", "months", 12, "年", "个月", 20),
         ("KiB", "bytes", 1024, "KiB", "字节", 9), ("GiB", "MiB", 1024, "GiB", "MiB", 9), ("feet", "inches", 12, "英尺", "英寸", 20)]
