builtin.module {
  kv.policy @knorm digest "db930c213bb1bad9" {
    %0 = kv.field "k" : !kv.expr<"id"> loc("library/knorm.kvp":3:33)
    %1 = kv.unary "norm" %0 : !kv.expr<"id"> -> !kv.expr<"i"> loc("library/knorm.kvp":3:28)
    %2 = kv.const "2048" : !kv.expr<""> loc("library/knorm.kvp":3:17)
    %3 = kv.count "budget" %2 loc("library/knorm.kvp":3:17)
    %4 = kv.top "bottom" by %1 count %3 scope "head" : !kv.expr<"i"> loc("library/knorm.kvp":3:10)
    %5 = kv.union %4 loc("library/knorm.kvp":3:10)
    kv.class @all loc("library/knorm.kvp":3:5)
    kv.keep %5 for @all at [#kv.trigger<"prefill.end", 0, "">] loc("library/knorm.kvp":3:5)
  } loc("library/knorm.kvp":2:1)
} loc(unknown)
