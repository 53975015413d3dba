builtin.module {
  kv.policy @freqkv digest "343c953d1fd0c9db" {
    kv.positions "compact" loc("library/freqkv.kvp":3:5)
    %0 = kv.const "8" : !kv.expr<""> loc("library/freqkv.kvp":4:15)
    %1 = kv.count "n_sink" %0 loc("library/freqkv.kvp":4:15)
    %2 = kv.region "sink" count %1 loc("library/freqkv.kvp":4:10)
    %3 = kv.count "8" %0 loc("library/freqkv.kvp":4:32)
    %4 = kv.region "recent" count %3 loc("library/freqkv.kvp":4:25)
    %5 = kv.union %2, %4 loc("library/freqkv.kvp":4:10)
    %6 = kv.loser "fold" by "dct" part "1/2" loc("library/freqkv.kvp":4:40)
    kv.class @all loc("library/freqkv.kvp":4:5)
    kv.keep %5 for @all at [#kv.trigger<"full", 4096, "">] else %6 loc("library/freqkv.kvp":4:5)
  } loc("library/freqkv.kvp":2:1)
} loc(unknown)
