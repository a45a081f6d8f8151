"""The Chinese sets of the sample: multifieldqa_zh, dureader, vcsum, lsht and passage_retrieval_zh."""

from collections.abc import Callable

from sparsecache.synthetic.build import Draft, Rng, estimate_tokens, fill, paragraphs, parts, share
from sparsecache.synthetic.chains import hops
from sparsecache.synthetic.facts import Link, Relation, World, article
from sparsecache.synthetic.fewshot import dealt, endless, labelled
from sparsecache.synthetic.passages import Wording, retrieve

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
    """One of about 80,000 people."""
    return rng.pick(_FAMILY) + rng.pick(_GIVEN) + rng.pick(_GIVEN)


def town(rng: Rng) -> str:
    return rng.pick(_PLACE) + rng.pick(_PLACE) + rng.pick("镇县村")


def year(rng: Rng) -> str:
    return f"{rng.span(1500, 2019)}年"


def number(rng: Rng) -> str:
    return str(rng.span(1001, 98999))


def thing(rng: Rng) -> str:
    return rng.pick(_QUALITIES) + rng.pick(_THINGS)


def trade(rng: Rng) -> str:
    return rng.pick(_CRAFTS) + rng.pick(_TRADES)


def firm(rng: Rng) -> str:
    return town(rng)[:2] + rng.pick(_FIRMS)


def dish(rng: Rng) -> str:
    return rng.pick(_COOKED) + rng.pick(_FOODS) + rng.pick(("", "面", "饭", "汤", "饼"))


def instrument(rng: Rng) -> str:
    return rng.pick(_QUALITIES) + rng.pick(_INSTRUMENTS)


def book(rng: Rng) -> str:
    return f"《{town(rng)}的{rng.pick(_THINGS)}》" if rng.chance(0.5) else f"《{person(rng)}与{rng.pick(_THINGS)}》"


def date(rng: Rng) -> str:
    return f"{year(rng)}{rng.span(1, 12)}月{rng.span(1, 28)}日"


_SCENERY = (
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


def scenery(rng: Rng) -> str:
    """A sentence about nobody, which answers nothing."""
    return rng.pick(_SCENERY).format(t=thing(rng), n=rng.pick(_THINGS), m=rng.span(1, 12))


def _link(noun: str, *says: str) -> Link:
    return Link(person, says, f"{{e}}的{noun}是谁？", that=f"那位{noun}")


PEOPLE = World(
    person,
    (
        Relation(date, ("{e}出生于{v}。", "{e}的生日登记为{v}。"), "{e}出生于哪一天？"),
        Relation(town, ("{e}是在{v}长大的。", "{e}的童年在{v}度过。"), "{e}是在哪里长大的？"),
        Relation(trade, ("{e}的职业是{v}。", "{e}靠做{v}谋生。"), "{e}的职业是什么？"),
        Relation(firm, ("{e}在{v}工作。", "从去年起，{e}受雇于{v}。"), "{e}在哪家单位工作？"),
        Relation(dish, ("{e}最爱吃{v}。", "{e}最喜欢的菜是{v}。"), "{e}最喜欢的菜是什么？"),
        Relation(instrument, ("{e}每天练习{v}。", "晚上{e}常常演奏{v}。"), "{e}演奏什么乐器？"),
        Relation(book, ("{e}写了{v}一书。", "{e}出版了{v}。"), "{e}写了哪本书？"),
    ),
    scenery,
    blank="",
    comma="，",
    conjunction="，",
    recalls=("如前所述，{s}", "再说一遍，{s}", "前面提到，{s}"),
    links=(
        _link("老师", "{e}的老师是{v}。", "{e}跟着老师{v}学习。"),
        _link("邻居", "{e}的邻居是{v}。", "{e}和邻居{v}常有来往。"),
        _link("合伙人", "{e}的合伙人是{v}。", "{e}与合伙人{v}一起做生意。"),
        _link("对手", "{e}的对手是{v}。", "{e}输给过对手{v}。"),
    ),
)
PLACES = World(
    lambda rng: town(rng)[:2] + rng.pick(("博物馆", "学校", "剧院", "灯塔", "市场", "酒坊", "医院")),
    (
        Relation(year, ("{e}建于{v}。",), clause="始建年份是{v}"),
        Relation(person, ("{e}由{v}设计。",), clause="图纸出自{v}之手"),
        Relation(town, ("{e}位于{v}。",), clause="可以在{v}找到"),
        Relation(number, ("每年有{v}人参观{e}。",), clause="一年接待{v}位客人"),
        Relation(book, ("{e}藏有{v}。",), clause="收藏了{v}"),
        Relation(date, ("{e}在{v}失过火。",), clause="遭遇火灾是在{v}"),
        Relation(dish, ("{e}的食堂供应{v}。",), clause="可以吃到{v}"),
    ),
    scenery,
    blank="",
    pronoun="这里",
)


def multifieldqa_zh(rng: Rng, room: float, repeats: float = 0.0) -> Draft:
    """A chronicle of many lives, and a question about one of them."""
    return article(rng, PEOPLE, room, repeats)


def dureader(rng: Rng, room: float, repeats: float = 0.0) -> Draft:
    """Two steps, from a person over another person to a fact."""
    return hops(rng, PEOPLE, room, 2, "文章{n}\n标题：{title}\n", repeats)


_CHINESE = Wording("段落{n}：", "{e}，{c}。", "文中介绍了一个地方，{c}。", "，而且", "这里仍是{heading}。")


def passage_retrieval_zh(rng: Rng, room: float, repeats: float = 0.0) -> Draft:
    """Which paragraph is the abstract from?"""
    return retrieve(rng, PLACES, _CHINESE, room, repeats)


_RESOLUTIONS = (
    "由{p}向{f}订购{t}",
    "把{t}送到{c}",
    "付给{f}{v}元用于{t}",
    "请{p}在{m}月以前修好{t}",
    "{p}负责与{f}联系",
    "在{c}举办{t}展览",
)


def _resolution(rng: Rng) -> str:
    return rng.pick(_RESOLUTIONS).format(
        p=person(rng), f=firm(rng), t=thing(rng), c=town(rng), v=number(rng), m=rng.span(1, 12)
    )


def vcsum(rng: Rng, room: float) -> Draft:
    """A meeting; its summary is the resolutions, each after `结论：`."""
    resolutions = [_resolution(rng) + "。" for _ in range(parts(room, 150, 2, 10))]
    speakers = rng.span(2, 6)

    def line(text: str) -> str:
        return f"讲者{rng.span(1, speakers)}：{text}"

    def chatter() -> str:
        return line(f"有人建议{_resolution(rng)}，但是没有通过。" if rng.chance(0.4) else scenery(rng))

    marked = [line("结论：" + resolution) for resolution in resolutions]
    lines = fill(room - sum(map(estimate_tokens, marked)), chatter)
    rng.insert(lines, *marked)
    return Draft("\n".join(lines), "", ["".join(resolutions)])


# No label is part of another one: the classification metric looks for labels inside the prediction.
_CLASSES = {
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


def _news(rng: Rng, kind: str, room: float) -> str:
    """A piece of news up to `类别：`."""
    lead = rng.pick(_CLASSES[kind]).format(c=town(rng), e=town(rng), p=person(rng), v=number(rng), d=rng.pick(_FOODS))
    frame = "新闻内容：\n{}\n类别："
    rest = fill(room - estimate_tokens(frame + lead), lambda: scenery(rng))
    return frame.format(paragraphs(rng, [lead, *rest], ""))


def lsht(rng: Rng, room: float) -> Draft:
    """News with their class, the asked class among them; half the time only they tell what a class is called."""
    labels = dealt(rng, _CLASSES)
    count = parts(room, 80, 3, 40)
    asked, *kinds = [rng.pick(list(labels)) for _ in range(count - 1)]
    rng.insert(kinds, asked)
    room -= sum(estimate_tokens(labels[kind] + "\n\n") for kind in kinds)

    def writer(kind: str) -> Callable[[float], str]:
        return lambda tokens: _news(rng, kind, tokens)

    query, *texts = share(room, [writer(kind) for kind in (asked, *kinds)])
    shown = labelled(texts, [labels[kind] for kind in kinds])
    more = endless(rng, lambda kind: (_news(rng, kind, 40), labels[kind]), kinds)
    return Draft("\n\n".join(shown), query, [labels[asked]], list(_CLASSES), more)
