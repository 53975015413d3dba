builtin.module {
  kv.policy @tova digest "83c767fcfa36144a" {
    %0 = kv.evidence "attn" over "last" 1 : !kv.expr<"gqi"> loc("library/tova.kvp":3:41)
    %1 = kv.reduce "sum" over "q" %0 : !kv.expr<"gqi"> -> !kv.expr<"gi"> loc("library/tova.kvp":3:23)
    %2 = kv.reduce "mean" over "g" %1 : !kv.expr<"gi"> -> !kv.expr<"i"> loc("library/tova.kvp":3:15)
    %3 = kv.reduce "mean" over "h" %2 : !kv.expr<"i"> -> !kv.expr<"i"> loc("library/tova.kvp":3:15)
    %4 = kv.const "2048" : !kv.expr<""> loc("library/tova.kvp":4:14)
    %5 = kv.count "budget" %4 loc("library/tova.kvp":4:14)
    %6 = kv.top "top" by %3 count %5 scope "shared" : !kv.expr<"i"> loc("library/tova.kvp":4:10)
    %7 = kv.union %6 loc("library/tova.kvp":4:10)
    kv.class @all loc("library/tova.kvp":4:5)
    kv.keep %7 for @all at [#kv.trigger<"prefill.end", 0, "">, #kv.trigger<"step", 0, "">] loc("library/tova.kvp":4:5)
  } loc("library/tova.kvp":2:1)
} loc(unknown)
