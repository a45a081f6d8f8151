"""Generators of multifieldqa_zh, dureader, vcsum, lsht and passage_retrieval_zh."""

from collections.abc import Callable

from sparsecache.synthetic.draft import Draft, Rng, estimate_tokens, fill, join_paragraphs, num_parts, write_parts
from sparsecache.synthetic.facts import Link, Relation, World, single_fact_draft
from sparsecache.synthetic.few_shot import append_labels, draw_labels, endless_questions
from sparsecache.synthetic.multi_hop import multi_hop_draft
from sparsecache.synthetic.passages import Wording, retrieval_draft

_FAMILY = "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦许何吕施张孔曹严华金魏陶姜谢邹窦章苏潘葛范彭鲁韦马"
_GIVEN = "安白冰波博超晨成川春丹德东芳飞风刚光国海浩恒宏华辉慧佳建江杰洁静娟军凯兰磊丽林玲龙曼梅敏"
_PLACE = "安白北碧长城池春翠大东丰福高古关河黑红湖花黄江金静兰丽临柳龙绿梅明南宁平青清泉桑沙山石水松桃天"
_THINGS = "灯笼 石桥 木船 铜钟 竹篮 瓷碗 旧书 风筝 纸伞 水车 钟楼 花园 剪刀 铁锅 屏风 书架 砚台 茶壶".split()
_QUALITIES = """
    红色的 古老的 安静的 破旧的 明亮的 小小的 高大的 精致的 普通的
    崭新的 厚重的 轻巧的 漂亮的 朴素的 笨重的 华丽的 发黄的
""".split()
_CRAFTS = "木材 丝绸 茶叶 玻璃 陶瓷 纸张 铜器 皮革 粮食 药材 船舶 钟表 灯具 乐器 地图 书籍 马具".split()
_TRADES = "商人 检验员 保管员 教师 画师 采购员 设计师 修理工 收藏家 推销员 编辑 研究员 搬运工 记录员".split()
_FIRMS = "银行 书店 纺织厂 报社 药厂 博物馆 铁路局 出版社 保险公司 茶庄 研究所 剧院".split()
_COOKED = "清蒸 红烧 油炸 凉拌 酸辣 糖醋 五香 葱爆 干煸 麻辣 白灼 香煎 酱焖".split()
_FOODS = "豆腐 鲤鱼 茄子 土豆 排骨 香菇 白菜 鸭肉 萝卜 虾仁 莲藕 竹笋 牛肉 冬瓜 鸡翅 海带".split()
_INSTRUMENTS = "二胡 琵琶 古筝 笛子 唢呐 月琴 扬琴 柳琴 大鼓 口琴 手风琴 小提琴 大提琴 长号".split()


def person(rng: Rng) -> str:
    """Return one of about 80,000 names."""
    return rng.choice(_FAMILY) + rng.choice(_GIVEN) + rng.choice(_GIVEN)


def town(rng: Rng) -> str:
    return rng.choice(_PLACE) + rng.choice(_PLACE) + rng.choice("镇县村")


def year(rng: Rng) -> str:
    return f"{rng.randint(1500, 2019)}年"


def number(rng: Rng) -> str:
    return str(rng.randint(1001, 98999))


def thing(rng: Rng) -> str:
    return rng.choice(_QUALITIES) + rng.choice(_THINGS)


def occupation(rng: Rng) -> str:
    return rng.choice(_CRAFTS) + rng.choice(_TRADES)


def firm(rng: Rng) -> str:
    return town(rng)[:2] + rng.choice(_FIRMS)


def dish(rng: Rng) -> str:
    return rng.choice(_COOKED) + rng.choice(_FOODS) + rng.choice(("", "面", "饭", "汤", "饼"))


def instrument(rng: Rng) -> str:
    return rng.choice(_QUALITIES) + rng.choice(_INSTRUMENTS)


def book(rng: Rng) -> str:
    return f"《{town(rng)}的{rng.choice(_THINGS)}》" if rng.chance(0.5) else f"《{person(rng)}与{rng.choice(_THINGS)}》"


def date(rng: Rng) -> str:
    return f"{year(rng)}{rng.randint(1, 12)}月{rng.randint(1, 28)}日"


_FILLER = (
    "门口挂着一盏{t}，已经挂了许多年。",
    "过路的人常常停下来看那{t}。",
    "到了{m}月，这条路就不通车了。",
    "没有人说得清{n}是从哪里来的。",
    "那年{m}月的雨一直下到月底。",
    "据说{t}能给旅客带来好运。",
    "关于{n}的旧文件大多在洪水中丢失了。",
    "天气晴朗的时候，可以望见远处的{n}。",
    "一条小路从{n}通向河边。",
)


def filler(rng: Rng) -> str:
    """Return a sentence that states no fact."""
    return rng.choice(_FILLER).format(t=thing(rng), n=rng.choice(_THINGS), m=rng.randint(1, 12))


def _link(noun: str, *statements: str) -> Link:
    return Link(person, statements, f"{{e}}的{noun}是谁？", reference=f"那位{noun}")


PEOPLE = World(
    person,
    (
        Relation(date, ("{e}出生于{v}。", "{e}的生日登记为{v}。"), "{e}出生于哪一天？"),
        Relation(town, ("{e}是在{v}长大的。", "{e}的童年在{v}度过。"), "{e}是在哪里长大的？"),
        Relation(occupation, ("{e}的职业是{v}。", "{e}靠做{v}谋生。"), "{e}的职业是什么？"),
        Relation(firm, ("{e}在{v}工作。", "从去年起，{e}受雇于{v}。"), "{e}在哪家单位工作？"),
        Relation(dish, ("{e}最爱吃{v}。", "{e}最喜欢的菜是{v}。"), "{e}最喜欢的菜是什么？"),
        Relation(instrument, ("{e}每天练习{v}。", "晚上{e}常常演奏{v}。"), "{e}演奏什么乐器？"),
        Relation(book, ("{e}写了{v}一书。", "{e}出版了{v}。"), "{e}写了哪本书？"),
    ),
    filler,
    separator="",
    list_separator="，",
    conjunction="，",
    repeat_frames=("如前所述，{s}", "再说一遍，{s}", "前面提到，{s}"),
    links=(
        _link("老师", "{e}的老师是{v}。", "{e}跟着老师{v}学习。"),
        _link("邻居", "{e}的邻居是{v}。", "{e}和邻居{v}常有来往。"),
        _link("合伙人", "{e}的合伙人是{v}。", "{e}与合伙人{v}一起做生意。"),
        _link("对手", "{e}的对手是{v}。", "{e}输给过对手{v}。"),
    ),
)
PLACES = World(
    lambda rng: town(rng)[:2] + rng.choice(("博物馆", "学校", "剧院", "灯塔", "市场", "酒坊", "医院")),
    (
        Relation(year, ("{e}建于{v}。",), clause="始建年份是{v}"),
        Relation(person, ("{e}由{v}设计。",), clause="图纸出自{v}之手"),
        Relation(town, ("{e}位于{v}。",), clause="可以在{v}找到"),
        Relation(number, ("每年有{v}人参观{e}。",), clause="一年接待{v}位客人"),
        Relation(book, ("{e}藏有{v}。",), clause="收藏了{v}"),
        Relation(date, ("{e}在{v}失过火。",), clause="遭遇火灾是在{v}"),
        Relation(dish, ("{e}的食堂供应{v}。",), clause="可以吃到{v}"),
    ),
    filler,
    separator="",
    pronoun="这里",
)


def multifieldqa_zh(rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return a text about many people, and a question about one of them."""
    return single_fact_draft(rng, PEOPLE, tokens, repeat_prob)


def dureader(rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return two hops: a person, a linked person, a fact about that person."""
    return multi_hop_draft(rng, PEOPLE, tokens, 2, "文章{n}\n标题：{title}\n", repeat_prob)


_WORDING = Wording("段落{n}：", "{e}，{c}。", "文中介绍了一个地方，{c}。", "，而且", "这里仍是{heading}。")


def passage_retrieval_zh(rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return numbered paragraphs; the answer is the paragraph that the abstract summarizes."""
    return retrieval_draft(rng, PLACES, _WORDING, tokens, repeat_prob)


_RESOLUTIONS = (
    "由{p}向{f}订购{t}",
    "把{t}送到{c}",
    "付给{f}{v}元用于{t}",
    "请{p}在{m}月以前修好{t}",
    "{p}负责与{f}联系",
    "在{c}举办{t}展览",
)


def _resolution(rng: Rng) -> str:
    return rng.choice(_RESOLUTIONS).format(
        p=person(rng), f=firm(rng), t=thing(rng), c=town(rng), v=number(rng), m=rng.randint(1, 12)
    )


def vcsum(rng: Rng, tokens: float) -> Draft:
    """Return a meeting; the summary is its resolutions, each after `结论：`."""
    resolutions = [_resolution(rng) + "。" for _ in range(num_parts(tokens, 150, 2, 10))]
    speakers = rng.randint(2, 6)

    def line(text: str) -> str:
        return f"讲者{rng.randint(1, speakers)}：{text}"

    def small_talk() -> str:
        return line(f"有人建议{_resolution(rng)}，但是没有通过。" if rng.chance(0.4) else filler(rng))

    key_lines = [line("结论：" + resolution) for resolution in resolutions]
    lines = fill(tokens - sum(map(estimate_tokens, key_lines)), small_talk)
    rng.insert(lines, *key_lines)
    return Draft("\n".join(lines), "", ["".join(resolutions)])


# No label contains another one: the classification metric searches for labels in the prediction.
CLASSES = {
    "农事种植": ("{c}的{d}今年丰收，农户{p}卖出{v}斤。", "{p}在{c}试种新品种，每亩增产{v}斤。"),
    "球类比赛": ("{c}队以两球战胜{e}队，{p}独进一球。", "{p}在{c}的乒乓球赛中夺冠，{v}名观众到场。"),
    "学校教学": ("{c}小学新学期招收{v}名学生，校长是{p}。", "教师{p}在{c}为学生编写了新课本。"),
    "医院卫生": ("{c}医院的{p}医生一年看了{v}名病人。", "{c}开始接种疫苗，护士{p}负责登记。"),
    "铁路公路": ("{c}到{e}的铁路通车，全长{v}米。", "司机{p}说，{c}的公路今日重新开放。"),
    "银行存款": ("{c}的银行下调利率，经理{p}称存款达{v}元。", "{p}在{e}的银行存入{v}元。"),
    "天气预报": ("{c}明天有大雨，气象员{p}提醒市民带伞。", "{c}气温骤降，{p}观测到大风。"),
    "法庭审判": ("{c}法院判决{p}赔偿{v}元。", "法官{p}在{c}审理一起合同纠纷。"),
    "戏曲演出": ("{p}在{c}剧院连演三场，售出{v}张票。", "{c}剧团的{p}排演新戏。"),
    "火灾救援": ("{c}一处仓库起火，消防员{p}救出多人。", "{c}发生火灾，损失{v}元，{p}正在调查。"),
    "旅游景点": ("{c}景区接待游客{v}人，导游{p}十分忙碌。", "游客{p}在{c}参观古塔。"),
    "矿产开采": ("{c}煤矿上月产煤{v}吨，矿长是{p}。", "勘探队长{p}在{c}发现铁矿。"),
}


def _news(rng: Rng, kind: str, tokens: float) -> str:
    """Return a news item up to `类别：`."""
    lead = rng.choice(CLASSES[kind]).format(
        c=town(rng), e=town(rng), p=person(rng), v=number(rng), d=rng.choice(_FOODS)
    )
    frame = "新闻内容：\n{}\n类别："
    rest = fill(tokens - estimate_tokens(frame + lead), lambda: filler(rng))
    return frame.format(join_paragraphs(rng, [lead, *rest], ""))


def lsht(rng: Rng, tokens: float) -> Draft:
    """Return labelled news items, and one to classify.

    At least one example has the label asked for. In half of the rows the labels are permuted (see `draw_labels`).
    """
    labels = draw_labels(rng, CLASSES)
    count = num_parts(tokens, 80, 3, 40)
    asked, *kinds = [rng.choice(list(labels)) for _ in range(count - 1)]
    rng.insert(kinds, asked)
    tokens -= sum(estimate_tokens(labels[kind] + "\n\n") for kind in kinds)

    def writer(kind: str) -> Callable[[float], str]:
        return lambda tokens: _news(rng, kind, tokens)

    query, *texts = write_parts(tokens, [writer(kind) for kind in (asked, *kinds)])
    shown = append_labels(texts, [labels[kind] for kind in kinds])
    follow_ups = endless_questions(rng, lambda kind: (_news(rng, kind, 40), labels[kind]), kinds)
    return Draft("\n\n".join(shown), query, [labels[asked]], list(CLASSES), follow_ups)
